"""The two HTTP clients, with address checks, rate limits, retries, robots.txt and circuit breakers."""
