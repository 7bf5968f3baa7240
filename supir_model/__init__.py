"""SUPIR: generative photograph restoration (networks, sampler, weights). Import what you need from its modules."""
