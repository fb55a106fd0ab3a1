"""Recipes, the reading and checking of settings, and a curator's decisions on single images."""
