"""Training of supir-tiny, and of adaptors for larger priors."""
