// The entry of the dashboard: mounts the view that the address names.
