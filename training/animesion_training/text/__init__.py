"""Tags of images as text: their tokens, and the masking of tokens that a network learns to predict."""
