#!/bin/sh
# Makes an unpacked root usable without running any package's scripts: certificates, a user, and no more files than needed.
set -eu
root=$1
mkdir -p "$root/etc/ssl/certs"
cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
rm -rf "$root"/usr/share/* "$root"/usr/bin/* "$root"/usr/sbin/* "$root"/usr/lib/*/gconv
find "$root/usr/lib" -name 'libssl*' -delete -o -name 'libcrypto*' -delete
printf 'root:x:0:0:root:/root:/sbin/nologin\nagentic:x:10001:10001:agentic:/tmp:/sbin/nologin\n' >"$root/etc/passwd"
printf 'root:x:0:\nagentic:x:10001:\n' >"$root/etc/group"
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
