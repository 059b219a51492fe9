"""Similarity of video frames for efficient video sampling."""
