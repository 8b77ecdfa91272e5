"""The one-command demonstration: an object store, the whole way of the data, and a report."""
