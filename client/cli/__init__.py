"""The triptych command."""
