"""What a trained network costs, looks at and gets wrong: profiles, explanations, audits, studies."""
