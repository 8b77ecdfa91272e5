"""From objects in storage to training samples: layouts, labels, catalog, split, preprocess, prepare, feed."""
