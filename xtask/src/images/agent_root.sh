#!/bin/sh
# The agent's user has a name and a home, as tools such as git and ssh expect.
set -eu
root=$1
printf 'agent:x:10001:10001:agent:/home/agent:/bin/bash\n' >>"$root/etc/passwd"
printf 'agent:x:10001:\n' >>"$root/etc/group"
mkdir -p "$root/home/agent" "$root/workspace"
chown 10001:10001 "$root/home/agent" "$root/workspace"
rm -rf "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/var/cache/*
