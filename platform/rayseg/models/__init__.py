"""Networks, losses and metrics: backend-neutral Keras, no Ray."""
