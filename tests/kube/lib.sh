# Sourced by up, node and down: the names, places and addresses of one cluster.
#
# A cluster has a name. It names its network namespaces (<name>-cp, <name>-node1, ...), its cgroups (<name>/cp,
# <name>/node1, ...) and its state directory, so that clusters with different names run beside each other. Inside of
# its namespaces every cluster uses the same addresses. Nothing here touches the machine's own network, mounts,
# sysctls or cgroup settings.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=${NODEMESH_KUBE:-nodemesh}
CACHE=${NODEMESH_KUBE_CACHE:-$HOME/.cache/nodemesh/kube}   # made by `cargo xtask kube build`, shared by all clusters
NODES=${NODES:-2}
PROXY_MODE=${PROXY_MODE:-nftables}                          # or iptables
GATEWAY_CHANNEL=${GATEWAY_CHANNEL:-standard}                # or experimental

BIN=$CACHE/bin
STATE=/var/tmp/nodemesh-kube/$NAME
LOG=$STATE/log
CONTROL_IP=172.30.0.1                                       # node N is 172.30.0.1N
PODS=10.244                                                 # pods of node N are $PODS.N.0/24
SERVICES=10.96.0.0/16
# The same once more: every cluster has both families, IPv4 first.
CONTROL_IP6=fd00:172:30::1                                  # node N is fd00:172:30::1N
PODS6=fd00:10:244                                           # pods of node N are $PODS6:N::/64
SERVICES6=fd00:10:96::/112
API_IP=10.96.0.1
DNS_IP=10.96.0.10

# Every cgroup hierarchy of the machine as "directory controllers", cgroup2 first. On a machine with cgroup2 alone it
# is one line; on a hybrid one each version 1 hierarchy follows.
hierarchies() {
  awk '{ for (i = 7; $i != "-"; i++); type = $(i + 1); options = $(i + 3)
         if (type == "cgroup2") print 0, $5, "cgroup2"
         else if (type == "cgroup") { sub(/^[^,]*,/, "", options)
           gsub(/(^|,)(xattr|clone_children|release_agent=[^,]*)/, "", options); sub(/^,/, "", options)
           print 1, $5, options } }' /proc/self/mountinfo |
    sort -s -k1,1n | awk '!seen[$2]++ { print $2, $3 }'
}
CGROUP2=$(hierarchies | awk '$2 == "cgroup2" { print $1; exit }')

say() { echo "[$(date +%T)] $*" >&2; }
fail() { say "$*"; exit 1; }

case $NAME in *[!a-z0-9-]* | "" | -* | ?????????????*) fail "NODEMESH_KUBE=$NAME: a name is up to 12 of a-z, 0-9 and -" ;; esac
[ "$(id -u)" = 0 ] || fail "this needs root: it makes network namespaces and cgroups"
[ -n "$CGROUP2" ] || fail "no cgroup2 hierarchy is mounted"
