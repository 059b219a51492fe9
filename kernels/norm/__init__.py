"""RMS norm, with the residual addition."""
