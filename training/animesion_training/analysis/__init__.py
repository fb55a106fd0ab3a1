"""Analysis of networks and labels: profiles, visual explanations, label audits, rankings of teachers, studies."""
