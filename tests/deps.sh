#!/bin/bash
# What building, testing and the demonstration need, and how to get it.
#
#   deps.sh --have GROUP...      exit 1 and say what is missing, if anything is
#   deps.sh --install GROUP...   install what is missing, and nothing if nothing is
#   deps.sh --extras GROUP...    install what may be missing, if it can be had
#   deps.sh --list GROUP...      name the packages, missing or not
#
# Groups: build, unit (unit tests), test (tests/t), serve, bench, fuzz, soak.
# Tried on Debian 12; the names for Fedora are given to the best of our knowledge.
set -u

# group | what is asked for | Debian and Ubuntu | Fedora
# pc:NAME>=VERSION asks pkg-config; py:NAMES asks for modules of python3;
# fio:ENGINE asks fio for an engine; nbdkit:NAME and filter:NAME ask nbdkit.
# Not here: sshd, which Debian starts when it is installed.  Tests use one that is there.
# GROUP? is for what the group can do without: it is installed with the rest of the group, if it
# can be had, and never missed.
table='
build | cmd:pkg-config        | pkg-config          | pkgconf-pkg-config
build | pc:nbdkit>=1.32       | nbdkit-plugin-dev   | nbdkit-devel
build | pc:libnbd>=1.14       | libnbd-dev          | libnbd-devel
build | pc:zlib               | zlib1g-dev          | zlib-devel
build | pc:libzstd            | libzstd-dev         | libzstd-devel
build? | pc:libisal           | libisal-dev         | isa-l-devel
build? | pc:libdeflate        | libdeflate-dev      | libdeflate-devel
build | cmd:cc                | gcc libc6-dev       | gcc
build | cmd:pod2man           | perl                | perl-podlators
unit  | pc:cmocka             | libcmocka-dev       | libcmocka-devel
unit  | cmd:prove             | perl                | perl-Test-Harness
test  | cmd:podchecker        | perl                | perl-Pod-Checker
test  | cmd:nbdkit            | nbdkit              | nbdkit-server
test  | cmd:nbdcopy           | libnbd-bin          | libnbd
test  | cmd:qemu-img          | qemu-utils          | qemu-img
test  | cmd:qemu-io           | qemu-utils          | qemu-img
test  | cmd:qemu-system-x86_64 | qemu-system-x86    | qemu-system-x86-core
test  | cmd:mke2fs            | e2fsprogs           | e2fsprogs
test  | cmd:mkfs.xfs          | xfsprogs            | xfsprogs
test  | cmd:mkntfs            | ntfs-3g             | ntfsprogs
test  | cmd:jq                | jq                  | jq
test  | py:json,zlib          | python3             | python3
test  | py:jsonschema         | python3-jsonschema  | python3-jsonschema
test  | cmd:busybox           | busybox-static      | busybox
test  | cmd:qemu-nbd          | qemu-utils          | qemu-img
test  | cmd:xz                | xz-utils            | xz
test  | cmd:psktool           | gnutls-bin          | gnutls-utils
test  | nbdkit:curl           | nbdkit              | nbdkit-curl-plugin
test  | nbdkit:ssh            | nbdkit              | nbdkit-ssh-plugin
test  | filter:xz             | nbdkit              | nbdkit-xz-filter
test  | filter:gzip           | nbdkit              | nbdkit-gzip-filter
test  | filter:tar            | nbdkit              | nbdkit-tar-filter
test  | fio:nbd               | fio                 | fio fio-engine-nbd
serve | cmd:nbdkit            | nbdkit              | nbdkit-server
serve | cmd:nbdinfo           | libnbd-bin          | libnbd
serve | cmd:qemu-img          | qemu-utils          | qemu-img
serve | cmd:mke2fs            | e2fsprogs           | e2fsprogs
bench | fio:nbd               | fio                 | fio fio-engine-nbd
bench | cmd:nbdkit            | nbdkit              | nbdkit-server
bench | cmd:nbdcopy           | libnbd-bin          | libnbd
bench | cmd:qemu-img          | qemu-utils          | qemu-img
bench | cmd:qemu-io           | qemu-utils          | qemu-img
bench | cmd:qemu-nbd          | qemu-utils          | qemu-img
bench | py:json               | python3             | python3
fuzz  | cmd:clang             | clang libclang-rt-dev | clang compiler-rt
soak  | cmd:fio               | fio                 | fio
soak  | cmd:guestfish         | libguestfs-tools    | guestfs-tools
soak  | cmd:virt-qemu-run     | libvirt-daemon-driver-qemu | libvirt-daemon-driver-qemu
soak  | cmd:virt-xml-validate | libvirt-clients     | libvirt-client
soak  | cmd:xmllint           | libxml2-utils       | libxml2
soak  | cmd:parallel          | parallel            | parallel
soak  | cmd:debootstrap       | debootstrap         | debootstrap
'

PATH=$PATH:/usr/sbin:/sbin      # e2fsprogs, debootstrap
action=${1:-}
shift
groups=" $* "

have ()
{
  local what=${1#*:}

  case $1 in
    cmd:*) command -v "$what" >/dev/null ;;
    py:*)  python3 -c "import $what" 2>/dev/null ;;
    nbdkit:*) nbdkit "$what" --dump-plugin >/dev/null 2>&1 ;;
    filter:*) nbdkit --filter="$what" null --dump-plugin >/dev/null 2>&1 ;;
    fio:*) fio --enghelp 2>/dev/null | grep -q -w "$what" ;;
    pc:*)  "${PKG_CONFIG:-pkg-config}" --exists "${what/>=/ >= }" 2>/dev/null ;;
  esac
}

if command -v apt-get >/dev/null; then
  column=3
elif command -v dnf >/dev/null; then
  column=4
else
  column=0
fi

missing=() packages=() extras=()
while IFS='|' read -r group what deb rpm; do
  read -r group <<<"$group"; read -r what <<<"$what"
  [[ -n $group && $groups == *" ${group%\?} "* ]] || continue
  if [[ $action != --list ]] && have "$what"; then continue; fi
  if [[ $group == *\? && $action != --list ]]; then
    case $column in 3) extras+=($deb) ;; 4) extras+=($rpm) ;; esac
    continue
  fi
  case $what in py:*) missing+=("python3 (${what#py:})") ;; fio:*) missing+=("fio (${what#fio:})") ;; nbdkit:*|filter:*) missing+=("nbdkit (${what#*:})") ;; *) missing+=("${what#*:}") ;; esac
  case $column in
    3) packages+=($deb) ;;
    4) packages+=($rpm) ;;
  esac
done <<<"$table"
# Each name once.
mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
[[ -n ${packages[*]} ]] || packages=()

as_root ()
{
  if [[ $(id -u) -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "This needs root, and there is no sudo.  As root, run:" >&2
    echo "  $*" >&2
    return 1
  fi
}

install_deb ()
{
  local get=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends)

  # The lists may be empty or older than the archive: fetched only if that shows.
  as_root "${get[@]}" install "$@" </dev/null && return
  as_root apt-get -q update </dev/null && as_root "${get[@]}" install "$@" </dev/null
}

# One by one: a system may lack some of them.
install_extras ()
{
  local p

  for p in "${extras[@]}"; do
    case $column in
      3) as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends install "$p" ;;
      4) as_root dnf -y install "$p" ;;
    esac </dev/null >/dev/null 2>&1 || echo "qcow2repair: not to be had, and not needed: $p"
  done
}

case $action in
  --list)
    printf '%s\n' "${packages[@]}"
    ;;
  --have)
    [[ ${#missing[@]} -eq 0 ]] && exit 0
    echo "qcow2repair: missing: ${missing[*]}" >&2
    echo "Run: make deps" >&2
    exit 1
    ;;
  --install)
    [[ ${#missing[@]} -eq 0 ]] && exit 0
    if [[ $column -eq 0 ]]; then
      echo "qcow2repair: missing: ${missing[*]}" >&2
      echo "No apt-get and no dnf here: install these your system's way." >&2
      exit 1
    fi
    echo "qcow2repair: installing: ${packages[*]}"
    if [[ $column -eq 3 ]]; then
      install_deb "${packages[@]}"
    else
      as_root dnf -y install "${packages[@]}" </dev/null
    fi || { echo "qcow2repair: could not install: ${packages[*]}" >&2; exit 1; }
    install_extras
    exec "$0" --have "$@"
    ;;
  --extras)
    install_extras
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
