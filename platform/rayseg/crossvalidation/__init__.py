"""Every patient held out once, and the models that did not see them, together."""
