"""Class counts, long-tail statistics, and plots of both."""
