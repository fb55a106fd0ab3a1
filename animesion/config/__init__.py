"""What a person writes down: recipes, how settings are read and checked, decisions on single images."""
