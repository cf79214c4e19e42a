"""Where arrays live: the mesh, the rule table, multi-host start-up."""
