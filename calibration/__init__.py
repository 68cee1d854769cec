"""Images and prompts -> what a quantiser needs to know about a model's activations."""
