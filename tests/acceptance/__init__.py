"""What `launch/accept.sh` runs on a machine before real work is trusted to it: docs/clusters.md."""
