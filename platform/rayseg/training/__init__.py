"""Training: one worker's loop, the trainer that runs it on many, and the callbacks between them."""
