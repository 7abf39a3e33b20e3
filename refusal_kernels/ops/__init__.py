"""The public operators: checks, autograd and registration. One file per operator."""
