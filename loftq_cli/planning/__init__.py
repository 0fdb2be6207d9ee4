"""From a recipe and headers to a plan: every unit of work and every output byte's place."""
