"""The keys of the config, how a run's config is built and checked, and the stages of a ladder."""
