"""The large models that methods are grafted onto, with the parameter names of their published checkpoints."""
