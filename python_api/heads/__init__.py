"""Which heads carry hallucination and refusal, and what turning them does to both."""
