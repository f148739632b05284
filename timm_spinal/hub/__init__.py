"""Publishing on the Hugging Face Hub, model cards, verification, exports. Takes a run folder or a model."""
