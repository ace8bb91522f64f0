"""Reports on the installation and local models, and checks of exactness on this machine."""
