package conf

import (
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// change makes the value another one.
func change(t *testing.T, v reflect.Value) {
	switch v.Interface().(type) {
	case time.Duration:
		v.SetInt(v.Int() + int64(time.Second))
		return
	case netip.Prefix:
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(v.Uint() + 1)
	case reflect.Slice:
		v.Set(reflect.Append(v, reflect.New(v.Type().Elem()).Elem()))
	default:
		t.Fatalf("a %v", v.Kind())
	}
}

// leaves gives every field that is a setting.
func leaves(v reflect.Value, visit func(name string, v reflect.Value)) {
	for i := range v.NumField() {
		f := v.Field(i)
		if f.Kind() == reflect.Struct {
			leaves(f, func(name string, v reflect.Value) { visit(reflect.TypeOf(v).Name()+name, v) })
			continue
		}
		visit(v.Type().Field(i).Name, f)
	}
}

// Caught: with a key left out of the table, its field is named here.
func TestEveryChangedSettingIsNoticed(t *testing.T) {
	volume, service := defaultVolume(), defaultService()
	if n := len(volume.Changes(defaultVolume())) + len(service.Changes(defaultService())); n != 0 {
		t.Errorf("%d changes of nothing", n)
	}
	n := 0
	leaves(reflect.ValueOf(&volume).Elem(), func(name string, v reflect.Value) {
		volume = defaultVolume()
		change(t, v)
		n++
		if keys := defaultVolume().Changes(volume); len(keys) != 1 {
			t.Errorf("a change of Volume's %s gives %v", name, keys)
		}
	})
	leaves(reflect.ValueOf(&service).Elem(), func(name string, v reflect.Value) {
		service = defaultService()
		change(t, v)
		n++
		if keys := defaultService().Changes(service); len(keys) != 1 {
			t.Errorf("a change of Service's %s gives %v", name, keys)
		}
	})
	if n < 50 {
		t.Errorf("only %d settings were looked at", n)
	}
}
