"""What memory there is, what is used, and the plan that decides how."""
