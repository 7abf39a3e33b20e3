"""Prompts and answers: the records everything else passes around, how they are put to a model, where they come from."""
