"""Planning: from the shapes and spacings of a set's volumes to a recipe of how to prepare them and train on them."""
