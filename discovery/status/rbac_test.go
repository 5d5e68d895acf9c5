package status

import (
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// allow gives the user of that name every right on the resources, and a role of the same name.
func (f *fixture) allow(name string, resources ...string) {
	f.t.Helper()
	rules := []rbacv1.PolicyRule{{APIGroups: []string{"*"}, Resources: resources, Verbs: []string{"*"}}}
	for _, r := range resources {
		rules[0].Resources = append(rules[0].Resources, r+"/status")
	}
	f.grant(name, rules)
}

// grant gives the user of that name a role of that name.
func (f *fixture) grant(name string, rules []rbacv1.PolicyRule) {
	f.t.Helper()
	if _, err := f.client.RbacV1().ClusterRoles().Create(f.t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}, metav1.CreateOptions{}); err != nil {
		f.t.Fatal(err)
	}
	f.bind(name, name)
}

func (f *fixture) bind(user, role string) {
	f.t.Helper()
	b := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user + "-" + role},
		RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: role},
		Subjects:   []rbacv1.Subject{{APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: user}},
	}
	if _, err := f.client.RbacV1().ClusterRoleBindings().Create(f.t.Context(), b, metav1.CreateOptions{}); err != nil {
		f.t.Fatal(err)
	}
}
