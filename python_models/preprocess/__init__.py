"""The preprocess stage: request JSON and media in, token ids, positions, plan and features out."""
