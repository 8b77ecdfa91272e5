"""The registered model over HTTP, on Ray Serve."""
