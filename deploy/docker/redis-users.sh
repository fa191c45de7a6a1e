#!/bin/sh
# Gives users of a Redis access list passwords of chance, once; what is there already is left alone.
#
#   redis-users.sh ACCESS_LIST OUT USER...     OUT/<user>/password for each, OUT/server/users.acl with their hashes
#
# Of compose.yaml, where each service mounts its own password and no other.
set -eu
list=$1 out=$2
shift 2
if [ -s "$out/server/users.acl" ]; then exit 0; fi
mkdir -p "$out/server"
cp "$list" "$out/server/users.new"
for user in "$@"; do
  mkdir -p "$out/$user"
  password=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
  printf '%s\n' "$password" >"$out/$user/password"
  hash=$(printf '%s' "$password" | sha256sum | cut -d ' ' -f 1)
  grep -q "^user $user off " "$out/server/users.new" || { echo "redis-users: no user $user in $list" >&2; exit 1; }
  sed -i "s/^user $user off /user $user on #$hash /" "$out/server/users.new"
done
mv "$out/server/users.new" "$out/server/users.acl"
