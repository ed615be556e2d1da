"""A plan on a Hugging Face model: apply, forwards, the selected layer, families."""
