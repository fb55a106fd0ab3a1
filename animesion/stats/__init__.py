"""How many images each class has, how long the tail is, and plots of both."""
