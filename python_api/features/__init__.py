"""Which directions carry refusal: latents by gradient attribution, bases from several sources, a pre-flight check."""
