"""The commands that train, evaluate and export; each imports torch when it runs, not before."""
