//! What is built from Go modules, and at which versions it is pinned.

/// A Go module of ours under `cluster/tools/` whose `go.mod` and `go.sum` pin what is built.
pub(super) struct Module {
    pub(super) folder: &'static str,
    pub(super) linker_flags: &'static str,
    /// Parts that are left out or taken in.
    pub(super) tags: &'static str,
}

/// One program of a module.
pub(super) struct Tool {
    pub(super) name: &'static str,
    pub(super) module: &'static Module,
    pub(super) package: &'static str,
}

// The version is stamped by the linker; without it the API server calls itself v0.0.0 and clients refuse it.
pub(super) const KUBERNETES: Module = Module {
    folder: "kubernetes",
    linker_flags: "-s -w \
        -X k8s.io/component-base/version.gitVersion=v1.34.4 \
        -X k8s.io/component-base/version.gitMajor=1 \
        -X k8s.io/component-base/version.gitMinor=34 \
        -X k8s.io/client-go/pkg/version.gitVersion=v1.34.4",
    tags: "",
};
/// The oldest whose modules the proxy has whole: of 1.29 the controller manager's are not to be had.
pub(super) const OLDEST_KUBERNETES: Module = Module {
    folder: "kubernetes-oldest",
    linker_flags: "-s -w \
        -X k8s.io/component-base/version.gitVersion=v1.30.4 \
        -X k8s.io/component-base/version.gitMajor=1 \
        -X k8s.io/component-base/version.gitMinor=30 \
        -X k8s.io/client-go/pkg/version.gitVersion=v1.30.4",
    tags: "providerless",
};
pub(super) const NEWEST_KUBERNETES: Module = Module {
    folder: "kubernetes-newest",
    linker_flags: "-s -w \
        -X k8s.io/component-base/version.gitVersion=v1.36.3 \
        -X k8s.io/component-base/version.gitMajor=1 \
        -X k8s.io/component-base/version.gitMinor=36 \
        -X k8s.io/client-go/pkg/version.gitVersion=v1.36.3",
    tags: "",
};
pub(super) const ETCD: Module = Module {
    folder: "etcd",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const COREDNS: Module = Module {
    folder: "coredns",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const LOCAL_PATH: Module = Module {
    folder: "local-path-provisioner",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const PODS: Module = Module {
    folder: "pods",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const KWOK: Module = Module {
    folder: "kwok",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const KUEUE: Module = Module {
    folder: "kueue",
    linker_flags: "-s -w",
    tags: "",
};
pub(super) const HELM: Module = Module {
    folder: "helm",
    linker_flags: "-s -w -X helm.sh/helm/v4/internal/version.version=v4.3.1",
    tags: "",
};

pub(super) const CONTROL_PLANE: &[Tool] = &[
    Tool {
        name: "kube-apiserver",
        module: &KUBERNETES,
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
    },
    Tool {
        name: "kube-controller-manager",
        module: &KUBERNETES,
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
    },
    Tool {
        name: "kubectl",
        module: &KUBERNETES,
        package: "k8s.io/kubernetes/cmd/kubectl",
    },
    Tool {
        name: "etcd",
        module: &ETCD,
        package: "go.etcd.io/etcd/server/v3",
    },
];

pub(super) const SCHEDULER: &[Tool] = &[Tool {
    name: "kube-scheduler",
    module: &KUBERNETES,
    package: "k8s.io/kubernetes/cmd/kube-scheduler",
}];

pub(super) const NODE: &[Tool] = &[
    Tool {
        name: "kubelet",
        module: &KUBERNETES,
        package: "k8s.io/kubernetes/cmd/kubelet",
    },
    Tool {
        name: "kube-proxy",
        module: &KUBERNETES,
        package: "k8s.io/kubernetes/cmd/kube-proxy",
    },
    Tool {
        name: "coredns",
        module: &COREDNS,
        package: "cluster/coredns",
    },
    Tool {
        name: "local-path-provisioner",
        module: &LOCAL_PATH,
        package: "github.com/rancher/local-path-provisioner",
    },
    Tool {
        name: "pause",
        module: &PODS,
        package: "cluster/pods/pause",
    },
    Tool {
        name: "volume-helper",
        module: &PODS,
        package: "cluster/pods/volume-helper",
    },
];

pub(super) const CHART: &[Tool] = &[Tool {
    name: "helm",
    module: &HELM,
    package: "helm.sh/helm/v4/cmd/helm",
}];

pub(super) const PRETENDED_NODES: &[Tool] = &[Tool {
    name: "kwok",
    module: &KWOK,
    package: "sigs.k8s.io/kwok/cmd/kwok",
}];

pub(super) const ADMISSION: &[Tool] = &[Tool {
    name: "kueue",
    module: &KUEUE,
    package: "sigs.k8s.io/kueue/cmd/kueue",
}];
