"""The two HTTP clients and their manners: address checks, rate limits, retries, robots.txt, circuit breakers."""
