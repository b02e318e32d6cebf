"""Images -> batches of views: sources, the plan of a view, transforms and loaders."""
