"""Language models and text encoders: flax.linen modules, their files, and sampling."""
