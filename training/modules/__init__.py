"""Parts of the networks, one concept a file; built and joined by the methods beside this package."""
