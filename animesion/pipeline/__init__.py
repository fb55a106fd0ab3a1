"""The five stages of a build, one module each; `runner` runs them in order."""
