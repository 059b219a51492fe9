"""Model families: where transformers' models are split into stages (see base.py)."""
