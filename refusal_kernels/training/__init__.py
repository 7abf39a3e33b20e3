"""The training step of a TopK sparse autoencoder: loss, gradients, AuxK, dead latents and the optimiser."""
