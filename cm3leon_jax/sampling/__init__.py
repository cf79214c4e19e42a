"""From prompts to tokens: prompt builders, samplers, the compiled loop."""
