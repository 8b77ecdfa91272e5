"""From a registered model to masks: one slice, or an archive."""
