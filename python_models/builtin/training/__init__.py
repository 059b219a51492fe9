"""How the built-in checkpoint was made: synthetic data, training and evaluation."""
