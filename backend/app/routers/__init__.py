"""The HTTP doors, one file a resource."""
